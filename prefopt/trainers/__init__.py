"""Subclasses of TRL's trainers, each with its config."""
