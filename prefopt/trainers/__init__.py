"""Thin subclasses of TRL's trainers, each beside its config."""
