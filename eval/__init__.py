"""From a trained model to a report: generate, score, metrics, report."""
