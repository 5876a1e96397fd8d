"""Prompts and token sets that come with Headwater."""

from headwater.lens.prompts.prompt_sets import prompt_set as prompt_set, prompt_sets as prompt_sets
