"""`prepare adapt chat`: the files of other fine-tuning programs, each record by its own shape."""
