"""Which radiographs to label, before any is labelled."""
