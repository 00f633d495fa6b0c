"""`python -m benchmarks.aot`: every Triton kernel compiled for GPUs that are not here, and read.

`recorder` takes down launches instead of making them, `calls` calls the ops on meta tensors,
`edges` are the calls whose arguments the runtime specialises otherwise, `launches` is all of it and
the number of variants; `compiling` compiles; `sass`, `amdgcn`, `code` and `ttgir` read what came
out; `table` compares it with kernels.json, which is committed.

Only `recorder` imports triton, without its interpreter; the others take it from there. The readers
and `table` need neither triton nor torch.
"""
