"""What the results mean: one frozen object of numbers for each subject, computed without a word or a picture.

comparison.py  the arms per task and release: scores, recovery, flips, the control, what each arm recalls
weights.py     drift between releases, and the residual that a port drops
literature.py  published figures that fit the experiment
costs.py       seconds and memory of the stages, apart from all else
summary.py     Findings: everything the report states, computed by `find`
"""
