"Imported by the process that the doors' processes are forked from: what each of them would load and compute alike"
import gc

import IPython.display # noqa: F401 the notebooks'
import matplotlib.pyplot # noqa: F401
import sklearn.manifold # noqa: F401 its map of samples

from arpo_nb.config import preset
from arpo_nb.evaluation import evaluate, plots, sample_writer # noqa: F401
from arpo_nb.systems import load_reward, system_of
from arpo_nb.training import launch # noqa: F401
from arpo_nb.training.plan import make_plan

for method in ('vapi', 'loofid'):
    make_plan(cfg := preset('toy', method)) # operations of its networks
    load_reward(cfg, system_of(cfg)) # moments of its pictures

gc.collect()
gc.freeze() # a collection looks through none of this, and copies no page of it
