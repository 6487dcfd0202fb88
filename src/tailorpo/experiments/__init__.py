"""The paper's experiments on the bundled miniature: `tailorpo experiment NAME`.

catalogue    every experiment as data        grid      from a grid to its cells, at equal budgets
cell         one training run, measured      runner    cells in processes of their own, resumable
statistics   intervals over seeds, prompts   tables, plots
conduct      from a name to results, table and plot
"""
