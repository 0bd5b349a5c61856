"""A model of your own, with what is known about it. In this folder:

arpo train --model own_model:record --method loofid --steps 2 --out_dir runs/mine
"""
from arpo_nb.models.toy import build_toy, toy_judge, toy_pictures
from arpo_nb.protocols import System
from arpo_nb.specs import ModelSpec, Recipe


def build(weights=None): # None, 'random', or a path
    policy, tokenizer = build_toy(weights) # yours here, see nbs/60_your_own_model.ipynb
    return System('mine', policy, tokenizer, toy_judge(), num_classes=10)


def record():
    settings = Recipe('arpo_nb.config:loofid_toy', dict(rewards='brightness'))
    return ModelSpec('mine', build, num_classes=10, data=toy_pictures, recipes=dict(loofid=settings))
