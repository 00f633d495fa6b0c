"""Does groundkern work with a model? Every vision-language type of transformers is tried."""

import benchmarks.families.torchvision_beside_cpu  # noqa: F401  before transformers imports it
