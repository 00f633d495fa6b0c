"""What the record of a call of make gpu says: sessions, failures, goals, tables, tiles."""
