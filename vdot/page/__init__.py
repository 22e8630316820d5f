"""The page: for people who make videos. A browser shows it, one process serves it, others generate.

``presets`` (what can be made, from what), ``texts`` (English and Chinese), ``uploads`` (what a browser sends, checked
and renamed), ``orders`` (a form as the model gets it), ``results`` (folders of sessions), ``worker`` (the process that
generates), ``engine`` (the queue, and restarts), ``app`` (the page itself), ``serve`` (the command).
"""
