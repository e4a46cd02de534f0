"""How much memory a training step takes, by arithmetic on `config.json` and the step's settings: nothing is loaded.

The peak of a step is the largest of its moments (`steps.py`); a moment is a sum of parts. What a moment holds follows
from what autograd keeps of a decoder layer (`layers.py`) and of a head (`heads.py`) and from who lives beside the model
that is trained: adapters, gradients, optimizer, reference, reward model, value function (`models.py`).
"""
