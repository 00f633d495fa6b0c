"""The processes of a call of make gpu: who starts them, when, and how they are ended."""
