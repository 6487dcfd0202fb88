"""When is the step reward right? `tailorpo jensen` measures r(x0hat(x_k)) against E[r(x_0) | x_k], step by step.

Every row belongs to a step k as `algorithm.train_steps` counts it: its siblings are two x_{k+1} drawn from the same
x_k, as TailorPO draws its candidates. With Q(x) = E[r(x_0) | x] and the Jensen gap G(x) = Q(x) - r(x0hat(x)), a pair is
ranked wrongly not when the gap is large but when its DIFFERENCE between the siblings outweighs Q_1 - Q_2.

    settings.py    how much is measured, at which steps, and what that costs
    siblings.py    siblings, their step rewards, lookahead, continuations with common random numbers
    posterior.py   tr Cov[x_0 | x_k] of the unguided network by three estimators; local constants of the reward
    bounds.py      what the gap cannot exceed
    measure.py     all of that for many states, saved state by state
    ranking.py     what the pairs of one step say: misranking, correlation, V_k, with intervals
    summary.py     the content of jensen.json;  verdict.py  the same in words
    tables.py, plots.py, page.py   Markdown and terminal, a picture, a page;  command.py  what the command calls

The page `docs/jensen.md` has the equations. Sources: second-order Tweedie (Efron 2011; TMPD, arXiv 2310.06721), the
Jensen bound of DPS (arXiv 2209.14687), TailorPO (arXiv 2502.01667) for the step reward. Left out: provable certificates
of single rankings (they need constants that no neural reward has), and ensembles, which give a picture no value of its
own.
"""
