"""Sections of the report: `section(results) -> HTML` each, raising `markup.Missing` when there is nothing to show."""
