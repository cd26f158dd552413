"""How conversations become text and tokens: the template of each model family.

A template is a file of data (`builtin/*.json`); whoever needs another one writes a file and names
its path. `template` says what is in such a file, `encoding` makes tokens with it, `hugging_face`
does the same with the Jinja template that comes with a tokenizer.
"""

from ml_data.templates.hugging_face import ChatTemplateFormat, chat_template_format
from ml_data.templates.loading import load_template, names
from ml_data.templates.template import Template

__all__ = ["ChatTemplateFormat", "Template", "chat_template_format", "load_template", "names"]
