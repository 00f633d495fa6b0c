"""groundkern in trainers that others wrote: a module or package each, which imports that trainer.

`shared` is what several of them need. Nothing here is imported by `import groundkern`.
"""
