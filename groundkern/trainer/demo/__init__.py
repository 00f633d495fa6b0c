"""The demo's data and model: word pages, charts and a pointing task, in the format users bring."""
