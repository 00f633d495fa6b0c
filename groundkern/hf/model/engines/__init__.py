"""Engines: how the main attention of a sequence that is split over ranks is computed.

engine.py    what an engine is given, and what all of them refuse
gather.py    keys and values of all ranks come to every rank: documents, padding and windows too
pieces.py    which of those keys the tokens of a rank see, run by run
"""
