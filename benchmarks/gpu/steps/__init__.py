"""What a call of make gpu does, a module per step."""
