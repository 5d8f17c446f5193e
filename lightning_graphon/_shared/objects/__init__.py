"""Objects of other people: what is in them, batches among them, and how they are restored."""
