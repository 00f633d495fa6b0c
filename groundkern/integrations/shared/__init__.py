"""What programs share: `settings` of a run, `records` of samples, `answers` under `sequences`
(rows of tokens that a program made), `training` (its trainer under ours).
"""
