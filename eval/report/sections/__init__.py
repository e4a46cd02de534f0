"""Sections of the report: `section(results)` gives its blocks, and raises `tables.Missing` when there is nothing to show."""
