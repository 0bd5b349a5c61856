"Compute the tables over seeds and the ledger again, from results/, in the pages that show them; run scripts/readme.py after it."
import json
import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = 'index', '62_claims', 'run_vapi', 'run_loofid', 'run_var', 'run_brightness'


def is_table(source: str) -> bool:
    "Whether a cell shows a table made from stored results"
    return 'Markdown(' in source and ('seed_table(' in source or 'ledger(' in source)


def compute(page: str) -> dict:
    "A page as it should be: its table cells with their outputs"
    from IPython.display import Markdown
    from arpo_nb.training import claims
    nb = json.loads((ROOT/'nbs'/f'{page}.ipynb').read_text(encoding='utf-8'))
    space = dict(vars(claims), Markdown=Markdown)
    for cell in nb['cells']:
        lines = ''.join(cell['source']).rstrip().splitlines()
        if cell['cell_type'] != 'code' or not is_table('\n'.join(lines)): continue
        exec('\n'.join(lines[:-1]), space)
        text = eval(lines[-1], space).data
        cell['outputs'] = [dict(data={'text/markdown': text.splitlines(keepends=True), 'text/plain': ['<IPython.core.display.Markdown object>']},
                                execution_count=None, metadata={}, output_type='execute_result')]
    return nb


if __name__ == '__main__':
    os.chdir(ROOT/'nbs')
    for page in PAGES:
        text = json.dumps(compute(page), indent=1, ensure_ascii=False) + '\n'
        (ROOT/'nbs'/f'{page}.ipynb').write_text(text, encoding='utf-8')
