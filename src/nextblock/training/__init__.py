"""From rows to a trained model: `step` does one optimizer step, `loop` the run with its stages. `setup` makes a `run`,
`resume` and `checkpoint` keep it, `output` and `export` write its result, `ranks` and `launcher` spread it over
processes, `log`, `flops` and `devices` tell of it. Imports `recipe` and below, never `decoding`. Start reading at
`step.train_step`.
"""
