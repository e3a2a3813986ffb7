"""HIL-SERL on the SO-101 arm, in plain PyTorch.

Read it in this order; each file says at its head what it is for, and what is not named here can wait.

1. schema.py: what an action, a state and an image are. errors.py, timing.py and config.py are short, and everywhere.
2. robot/: feetech.py and bus.py (bytes), calibration.py and arm.py (ticks and radians), kinematics.py, camera.py,
   safety.py, teleop.py (the person).
3. sim/: servos.py, world.py, camera.py, operator.py: the same bytes, pictures and person without an arm.
4. env.py (one control step), rig.py (what of all that is real), record.py (the first script, beside this package).
5. data/: layout.py, video.py, dataset.py, writer.py, labels.py. lint.py and edit.py are for data that went wrong.
6. episodes.py: from recordings to transitions, the only bridge from data/ to learn/.
7. learn/: resnet10.py, networks.py, reward.py, reward_training.py, replay.py, sac.py, eyes.py; then train_reward.py.
   link.py and wire.py join two processes, captured.py is for a graphics card.
8. actor.py, learner.py and monitor.py: what the two loops of train_sac.py keep; then train_sac.py.
9. evaluation.py and starts.py; then infer.py. reports/, web/ and tools/ are for people.
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
