"""One short script per step of the pipeline, and the YAML files that configure them."""

import logging

# On some CPUs bitsandbytes asks at every import for a package that only speeds up its CPU inference.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels-community" not in record.getMessage()
)
