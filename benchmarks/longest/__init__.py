"""The longest sample that one device trains on, by counting, and what a step really holds."""
