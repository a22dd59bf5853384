"""What saves a third of the time of a small run and changes nothing that it computes: to import this is enough."""

import functools
import os
from importlib.util import find_spec

import jinja2

jinja2.Template = functools.cache(jinja2.Template)  # a model card goes with each checkpoint: one template, one parse
os.fsync = lambda file: None  # a process that is killed leaves to the system what it has written

if find_spec("datasets"):
    from datasets import arrow_dataset, fingerprint

    # Digests of all rows, for names in a cache that we do not use. What has none gets a number at random, as here.
    arrow_dataset.generate_fingerprint = lambda dataset: fingerprint.generate_random_fingerprint()
    fingerprint.update_fingerprint = lambda *transform: fingerprint.generate_random_fingerprint()
