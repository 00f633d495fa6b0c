"""What can end an evaluation beside its data."""


class RankError(Exception):
    """Another process ended or did not come; the message is one sentence for the user."""
