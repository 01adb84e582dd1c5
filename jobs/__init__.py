"""The doors: one file, one command, one `ray job submit` entry point."""
