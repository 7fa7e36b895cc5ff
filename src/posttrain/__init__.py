"""posttrain: a whole LLM post-training recipe as one short file."""

from posttrain.recipe import Recipe, Stage
from posttrain.suites.domain import Domain, Procedural, Suite, Table, VerifierSpec

__version__ = "0.1.0"

__all__ = ["Domain", "Procedural", "Recipe", "Stage", "Suite", "Table", "VerifierSpec"]
