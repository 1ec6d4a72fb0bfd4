"""Pictures and pages of masks and their figures."""
