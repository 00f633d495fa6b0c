"""What a call costs, counted and not timed: floors, memory models, instructions, growth."""
