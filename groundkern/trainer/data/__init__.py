"""From a JSON-lines file and a folder of images to checked samples and batches."""
