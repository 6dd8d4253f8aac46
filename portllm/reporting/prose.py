"""How to read each section, in plain words; headings and notes that hold no number."""

from __future__ import annotations

PROBE = (
    "Can the bare release recall the facts that a task asks about? Below {threshold} on {first} a patch has nothing to "
    "build on, so the task is marked {dagger} everywhere. That says nothing about porting, and the task stays in."
)
ARMS = (
    "base is the release alone; tuned, the patch where it was made; ported, the same patch put onto a later release "
    "without training; retuned, a new patch trained on that release, the costly reference. Recovery is the share of "
    "re-tuning's gain that the port keeps; a negative flip is an example that tuned got right and ported gets wrong."
)
ARMS_NOTE = (
    "Scores, recovery and flips in %; differences in percentage points with a 95% bootstrap interval over the test "
    "examples; p is McNemar's exact test on the same examples. Recovery is – where re-tuning gains less than {least} "
    "points. Valid format: share of answers in the expected form, of the worst arm. Intervals cover the "
    "choice of test examples, not the luck of training seeds."
)
KNOWLEDGE = (
    "A release brings changed and new facts; kept facts were true before. A good port knows the news as the bare "
    "release does, the old tuned model cannot. Perplexity is on unseen text about the release's facts: lower is better."
)
SURPRISE = (
    "Perplexity on text of the kind the release was made from, which it has not read: lower is better. A good port "
    "expects it as the bare release does, the old tuned model less."
)
PUBLISHED = (
    "Figures of papers on the same task, beside ours where params.yaml keeps what we know of their patch settings; the "
    "rest (how a release was updated, above all) is our choice. Theirs were made with other data, versions and "
    "machines, some perhaps on another model: equal is not to be expected."
)
ABSENT = "Sections that had nothing to say."
DRIFT = (
    "Drift is ‖θ' − θ‖ / ‖θ‖ (Frobenius norm), per module and in all: how far a release's weights lie from an earlier "
    "one's. Large drift is a warning, not a verdict: there is no universal threshold, so read it beside the scores."
)
RESIDUAL = (
    "Re-tuning on the release gives Δ'; the port uses the old Δ and drops R = Δ' − Δ. ‖R‖/‖θ' + Δ‖ compares R with the "
    "whole model and is usually tiny because ‖θ'‖ is large. ‖R‖/‖Δ‖ compares R with the patch: 0 means the same patch, "
    "about 1.4 two unrelated ones of equal size. A port can work even then: parameter distance does not explain it."
)
TRAINING = (
    "Loss on the answers, per optimisation step. The curve of {first} is the patch that is ported; later releases' "
    "curves are the re-tuned references. A curve that does not fall means that there was no patch worth porting."
)
COST = (
    "Seconds include starting the process and importing libraries; memory is the process's peak on this machine. On a "
    "small model starting up dominates both; the ratio grows with the model. Porting trains nothing and reads no data."
)
NO_PROBE = "No probe was recorded when the base was made."
NO_PAPER = "The papers' figures are left out, as the settings differ: {how}."
NO_NEWS = "No later release was asked about its own corpus."
NO_DRIFT = "There is no later release to compare with the first."
NO_RESIDUAL = "No patch was re-tuned on a later release, so R is not known."
NO_TRAINING = "No training history was found."
NO_COST = "No cost was recorded."
