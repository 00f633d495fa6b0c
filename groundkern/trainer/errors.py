"""What can end a command of several processes beside its data."""


class RankError(Exception):
    """Another process ended or did not come; the message is one sentence for the user."""
