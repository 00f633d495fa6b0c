"""Who is timed beside us: what people write today, other libraries, FlexAttention."""
