"""Words with box and confidence from images: engines, turned pages, pages not worth keeping."""
