"""Divergences of attention maps that are never stored: `api` over `blocks` over `terms`."""
