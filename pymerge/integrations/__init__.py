"""pymerge inside other tools: mergekit and PEFT, each with `enable()` and `disable()`."""
