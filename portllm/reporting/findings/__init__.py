"""What the results mean: frozen objects of numbers, one module for each subject, without a word or a picture.

    arms.py        the arms per task and release: scores, recovery, flips, the control, what each arm recalls
    weights.py     drift between releases, and the residual that a port drops
    literature.py  published figures that fit the experiment
    costs.py       seconds and memory of the stages, apart from all else
    summary.py     Findings: everything the report states

`find` computes Findings from results, `find_costs` the page of costs from cost files.
"""
