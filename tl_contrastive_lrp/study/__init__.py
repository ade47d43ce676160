"""The study room: many failures of a model, collected, explained, labelled and reported.

A study is a file, ``study.yaml``, that names models and benchmarks. ``Study.load(path)`` reads it;
``plan``, ``run``, ``label`` and ``report`` are its steps, and ``clrp study`` the same steps on the
command line. What each step finds lies in a store, one file a case, so that a study can be
interrupted, continued and shared between machines.

From the bottom to the top: ``cases`` (the record of one failure), ``benchmarks`` and ``logs``
(where completions and verdicts come from), ``collect`` (from a failure to its first wrong token and
a contrast), ``analysis`` and ``analyse`` (what attribution says of a case), ``store``, ``settings``
and ``run``, then ``labels``, ``sizes`` and ``report``.
"""
