"""The processes of one run: how they start, meet, choose devices and fail together."""
