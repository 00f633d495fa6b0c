"""groundkern in trainers that others wrote: one module each, which imports that trainer.

Nothing here is imported by `import groundkern`.
"""
