"""One short script per step of the pipeline, and the YAML files that configure them."""
