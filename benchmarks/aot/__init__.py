"""`python -m benchmarks.aot`: compiles every Triton kernel for absent GPUs and reads the machine
code.

`recorder` notes launches instead of making them, `calls` calls the ops on meta tensors, `edges` are
calls whose arguments the runtime specialises in another way, `launches` has all of them and counts
variants; `compiling` compiles; `reading` has the readers of what comes out; `wanted` says what they
must find in attention kernels; `table` compares it with kernels.json, which is committed.

Only `recorder` imports triton, without its interpreter; the others import it from there. The
readers, `wanted` and `table` need neither triton nor torch.
"""
