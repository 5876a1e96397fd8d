"""The public names, for editors and type checkers; `__init__.py` reads this list too."""

from types import ModuleType

from headwater.analyses._corpora.collect import corpus as corpus
from headwater.analyses._corpora.headvis import export_headvis as export_headvis
from headwater.analyses._corpora.result import Corpus as Corpus
from headwater.analyses._sweeps.export import export_sweep as export_sweep
from headwater.analyses._sweeps.merge import merge_runs as merge_runs
from headwater.analyses._sweeps.run_sweep import run_sweep as run_sweep
from headwater.analyses._sweeps.sweep import Sweep as Sweep
from headwater.analyses._sweeps.sweep_run import SweepRun as SweepRun
from headwater.dashboard.figures.figure import figure as figure
from headwater.kernels.maps.attention_map import AttentionMap as AttentionMap
from headwater.lens import losses as losses, recipes as recipes
from headwater.lens.edits import *
from headwater.lens.edits import edit_from_dict as edit_from_dict
from headwater.lens.errors import HeadwaterError as HeadwaterError
from headwater.lens.examples.example import Example as Example
from headwater.lens.experiments.experiment import Experiment as Experiment
from headwater.lens.loading.load import load as load
from headwater.lens.loading.removal import remove_heads as remove_heads
from headwater.lens.model import HookedModel as HookedModel
from headwater.lens.naming.heads import Head as Head
from headwater.lens.naming.on_grid import on_grid as on_grid
from headwater.lens.prompts import prompt_set as prompt_set
from headwater.lens.prompts.token_sets import (
    sets_measure as sets_measure,
    years_measure as years_measure,
)
from headwater.lens.records.divergence import attention_divergence as attention_divergence
from headwater.lens.records.record import Record as Record
from headwater.lens.running.branches import Branch as Branch

__version__: str
analyses: ModuleType
