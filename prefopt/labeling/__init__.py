"""From samples to ranked comparisons by people: sheets for the browser, their answers, and how far labelers agree."""
