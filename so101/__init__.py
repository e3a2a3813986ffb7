"""HIL-SERL on the SO-101 arm, in plain PyTorch.

Read it in this order: schema.py (what an action and a state are), robot/ (bytes to joints to a moving arm),
sim/ (the same bytes without an arm), env.py (one control step), data/ (recordings), episodes.py (recordings to
transitions), learn/ (networks, classifier, SAC), actor.py and learner.py (what the two loops of training keep),
then the five scripts beside this package. What is left is for people: web/ (pages), reports/, evaluation.py, tools/.
"""

import os

# OpenMP threads that spin while they wait take the cores from the camera, the video encoder and the other
# process: with one busy neighbour on two cores a critic update took 910 ms instead of 40. A short spin bridges
# the gap to the next operation: 21 ms where none takes 27, and 42 against 38 beside that neighbour.
# Must come before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# A learner that goes away is nothing unusual, and torch prints twenty lines of its own stack for it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
