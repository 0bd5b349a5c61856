"The site without quarto: what it would refuse, spoil, cut off, or leave dead; and with it, if it is there."
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, once

sys.path.insert(0, str(ROOT/'scripts'))
from outputs import tidy, without_places

NBS = ROOT/'nbs'
WIDTH = 88
PAGES = {p.name: json.loads(p.read_text(encoding='utf-8')) for p in sorted(NBS.glob('*.ipynb'))}
HIDDEN = re.compile(r'^#\|\s*(export|exporti|hide|default_exp)\b|^#\|\s*include:\s*false', re.M)
EXPORT = re.compile(r'^#\|\s*(exports?|exporti)\b', re.M)


def source(cell): return ''.join(cell['source'])


def page_name(notebook): return re.sub(r'^\d+[a-zA-Z0-9]*_', '', notebook.removesuffix('.ipynb').lower()) + '.html'


def prose(name):
    "Markdown of a page without code blocks and code spans"
    text = '\n\n'.join(source(c) for c in PAGES[name]['cells'] if c['cell_type'] == 'markdown')
    return re.sub(r'`[^`\n]*`', '', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S))


def links(name): return re.findall(r'\]\(([^()\s]+)\)', prose(name))


# The file quarto reads

def test_quarto_settings_have_the_types_that_quarto_wants():
    yaml = pytest.importorskip('yaml')
    conf = yaml.safe_load((ROOT/'_quarto.yml').read_text())
    site, html = conf['website'], conf['format']['html']
    assert conf['project']['type'] == 'website' and all(isinstance(r, str) for r in conf['project']['resources'])
    for key, kind in dict(favicon=str, title=str).items(): assert isinstance(site.get(key, ''), kind), key
    for key in ('twitter-card', 'open-graph', 'page-navigation', 'back-to-top-navigation', 'search'):
        assert isinstance(site.get(key, True), bool), key
    for key in ('toc', 'code-line-numbers', 'code-copy', 'respect-user-color-scheme'): assert isinstance(html.get(key, True), bool), key
    assert html['html-math-method'] in ('mathml', 'katex') and html['code-overflow'] == 'wrap'
    assert set(site['repo-actions']) <= {'edit', 'source', 'issue'} and set(html['theme']) == {'light', 'dark'}
    files = [site['favicon'], html['css'], *(f for t in html['theme'].values() for f in t if f.endswith('.scss'))]
    assert not [f for f in files if not (NBS/f).is_file()]
    hrefs = [item['href'] for item in site['navbar']['left'] if item['href'].endswith('.ipynb')]
    assert hrefs and not [h for h in hrefs if h not in PAGES]


def test_sidebar_has_every_page_once():
    listed = re.findall(r'[\w-]+\.ipynb', (NBS/'sidebar.yml').read_text())
    assert sorted(listed) == sorted(PAGES)


def test_what_users_of_other_trainers_look_for_is_there():
    "Every field and every test that the trainer's table names"
    table = next(source(c) for c in PAGES['41_trainer.ipynb']['cells'] if '| there | here | shown by |' in source(c))
    rows = [[c.strip() for c in line.strip('|').split('|')] for line in table.splitlines() if line.startswith('| ')][1:]
    tests = '\n'.join(p.read_text(encoding='utf-8') for p in sorted((ROOT/'tests').glob('test_*.py')))
    from arpo_nb.config import Config
    fields = {f.name for f in dataclasses.fields(Config)}
    assert len(rows) >= 14
    for there, here, shown in rows:
        named = re.findall(r'`(test_\w+)`', shown)
        assert all(f'def {n}' in tests for n in named) and (named or 'ipynb)' in shown), shown
        words = [w for code in re.findall(r'`([^`]+)`', here) for w in re.findall(r'^[a-z][a-z_]+(?==|$)', code)]
        assert not [w for w in words if w not in fields | {'evaluate', 'callbacks', 'snapshots', 'weights', 'train', 'run'}], words


def test_no_two_notebooks_are_one_page():
    names = [page_name(n) for n in PAGES]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)


def test_nothing_comes_from_a_foreign_server():
    for f in [*NBS.glob('*.css'), *NBS.glob('*.scss')]: assert not re.search(r'@import|https?://', f.read_text()), f
    for f in NBS.glob('*.scss'): assert '$web-font-path: false' in f.read_text(), f'{f.name}: cosmo would load a font'


def test_folders_of_the_site_are_copied():
    settings = (ROOT/'settings.ini').read_text()
    assert re.search(r'^recursive = True', settings, re.M), 'else nbs/images and nbs/fonts stay behind'
    for url in re.findall(r'url\("([^"]+)"\)', (NBS/'styles.css').read_text()): assert (NBS/url).is_file(), url


# Links

def slugs(name):
    "Anchors of a page: its headings, and the entries of what it exports"
    text = '\n'.join(re.sub(r'^```.*?^```', '', source(c), flags=re.M | re.S) for c in PAGES[name]['cells'] if c['cell_type'] == 'markdown')
    heads = [re.sub(r'[*`$]|\]\([^)]*\)|\[', '', h) for h in re.findall(r'^#+ (.+)$', text, re.M)]
    found = {re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', h.lower()).strip()).lstrip('0123456789.-') for h in heads}
    code = '\n'.join(source(c) for c in PAGES[name]['cells'] if c['cell_type'] == 'code')
    return found | {n.lower() for n in re.findall(r'^(?:def|class) (\w+)', code, re.M)}


@pytest.mark.parametrize('name', PAGES)
def test_links_lead_somewhere(name):
    dead = []
    for link in links(name):
        if re.match(r'https?://|mailto:', link): continue
        target, _, anchor = link.partition('#')
        target = target or name
        if target.endswith('.html'): dead.append(f'{link} (link to the notebook, which the site renames)')
        elif target.endswith('.ipynb'):
            if target not in PAGES: dead.append(link)
            elif anchor and anchor not in slugs(target): dead.append(f'{link} (no such heading)')
        elif not (NBS/target).is_file(): dead.append(link)
    assert not dead


def test_slugs_see_what_is_there():
    assert 'references' in slugs('13_grpo.ipynb') and 'grpo_loss' in slugs('13_grpo.ipynb') and 'nothing' not in slugs('13_grpo.ipynb')


def test_home_leads_to_every_page():
    text = source(PAGES['index.ipynb']['cells'][-1])
    assert set(links('index.ipynb')) >= set(PAGES) - {'index.ipynb'}, 'run python scripts/readme.py'
    titles = {n: re.match('# (.+)', source(nb['cells'][0]))[1] for n, nb in PAGES.items()}
    assert not [n for n, t in titles.items() if n != 'index.ipynb' and f'[{t}]({n})' not in text]


def test_readme_is_the_home_page_seen_from_the_root():
    spec = importlib.util.spec_from_file_location('readme', ROOT/'scripts/readme.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert text == module.readme(), 'run python scripts/readme.py'
    local = [l for l in re.findall(r'\]\(([^()\s]+)\)', text) if not l.startswith('http')]
    assert len(local) > 20 and not [l for l in local if not (ROOT/l.partition('#')[0]).is_file()]


def test_docs_leave_the_readme_as_it_is():
    recipe = re.search(r'^docs:.*\n((?:\t.*\n)+)', (ROOT/'Makefile').read_text(), re.M)[1].split('\n\t')
    steps = [line.strip() for line in recipe if line.strip()]
    assert 'nbdev_docs' in steps[0] and steps[-1].endswith('scripts/readme.py')


# Formulas

def test_every_formula_is_read(tmp_path):
    pypandoc = pytest.importorskip('pypandoc')
    text = '\n\n'.join(f'# page {n}\n\n{source(c)}' for n in PAGES for c in PAGES[n]['cells'] if c['cell_type'] == 'markdown')
    (tmp_path/'all.md').write_text(text, encoding='utf-8')
    done = subprocess.run([pypandoc.get_pandoc_path(), '-f', 'markdown', '-t', 'html', '--mathml', 'all.md', '-o', 'all.html'],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 'TeX' not in done.stderr, done.stderr[:3000]
    html = (tmp_path/'all.html').read_text(encoding='utf-8')
    assert html.count('<math') > 300 and 'class="math' not in html


@pytest.mark.parametrize('name', PAGES)
def test_formulas_use_nothing_that_vanishes(name):
    assert not re.findall(r'\\(?:tag|boxed|label|eqref|Big[lr]?)\b', prose(name)), r'\tag, \boxed and \Bigl are lost on the way to MathML: write \qquad (9), \bigl'


# Code

def code_blocks(name):
    "Every block of code that a reader sees"
    for cell in PAGES[name]['cells']:
        if cell['cell_type'] == 'code':
            if not HIDDEN.search(source(cell)): yield '\n'.join(l for l in source(cell).splitlines() if not l.startswith('#|'))
        else: yield from re.findall(r'^```[^\n]*\n(.*?)^```', source(cell), re.M | re.S)


def test_code_fits_its_column():
    blocks = [(name, b) for name in PAGES for b in code_blocks(name)]
    wide = [name for name, b in blocks if any(len(l) > WIDTH for l in b.splitlines())]
    worst = sorted({n: wide.count(n) for n in wide}.items(), key=lambda kv: -kv[1])[:12]
    assert len(blocks) > 500 and len(wide) <= .05*len(blocks), f'{len(wide)} of {len(blocks)} are wider than {WIDTH}: {worst}'


def test_most_of_the_code_is_there():
    lines = dict(seen=0, all=0)
    for nb in PAGES.values():
        for cell in nb['cells']:
            kind = EXPORT.search(source(cell)) if cell['cell_type'] == 'code' else None
            if not kind: continue
            n = sum(bool(l.strip()) and not l.startswith('#|') for l in source(cell).splitlines())
            lines['all'] += n
            lines['seen'] += n*(kind[1] == 'exports')
    assert lines['seen'] >= .6*lines['all'], lines


@pytest.mark.parametrize('name', ['Policy', 'Tokenizer', 'Reward', 'Config', 'Rollout', 'Batch', 'System', 'Streams', 'grpo_loss', 'teacher_forced',
                                  'free_running', 'RollOut', 'PolicyGradient', 'update', 'train', 'loo_rewards', 'VAR', 'VQModel', 'GPT'])
def test_what_the_pages_explain_is_shown(name):
    cells = [source(c) for nb in PAGES.values() for c in nb['cells'] if c['cell_type'] == 'code']
    owners = [s for s in cells if EXPORT.search(s) and re.search(rf'^(?:def|class) {name}\b', s, re.M)]
    assert owners and all(EXPORT.search(s)[1] == 'exports' for s in owners)


@pytest.mark.parametrize('name', ['config.Config', 'protocols.Rollout', 'protocols.Batch', 'protocols.System', 'protocols.Streams'])
def test_every_field_has_a_group_and_a_meaning(name):
    "What is grouped in the source is grouped in the page's tables"
    from arpo_nb.docs import field_notes, field_table
    module, _, name = name.rpartition('.')
    cls = getattr(importlib.import_module(f'arpo_nb.{module}'), name)
    notes = field_notes(cls)
    assert [n.name for n in notes] == [f.name for f in dataclasses.fields(cls)]
    assert not [n.name for n in notes if not n.group or not n.meaning]
    table = field_table(cls)
    assert table.count('| field | type |') == len({n.group for n in notes}) and all(f'**{n.group}**' in table for n in notes)


RUNS = [name for name in PAGES if name.startswith('run_')]


def parameters(name):
    cell, = [c for c in PAGES[name]['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    return cell


@pytest.mark.parametrize('name', RUNS)
def test_every_parameter_has_a_group_and_a_meaning(name):
    from arpo_nb.docs import field_notes
    notes, given = field_notes(source(parameters(name))), {}
    exec(source(parameters(name)), given)
    assert [n.name for n in notes] == [k for k in given if k != '__builtins__']
    assert not [n.name for n in notes if not n.group or not n.meaning]
    code = [c for c in PAGES[name]['cells'] if c['cell_type'] == 'code']
    assert code[0] is parameters(name), 'parameters come first, so that what follows can use them'


@pytest.mark.parametrize('name', RUNS)
def test_parameters_are_not_told_in_paragraphs(name):
    text = '\n\n'.join(source(c) for c in PAGES[name]['cells'] if c['cell_type'] == 'markdown')
    section = re.search(r'^## Parameters\n(.*?)(?=^## |\Z)', text, re.M | re.S)[1]
    assert max(len(p.split()) for p in re.split(r'\n\n|\n- ', section)) < 90


@pytest.mark.parametrize('name', RUNS)
def test_papermill_reads_every_parameter(name):
    "`papermill --help-notebook`; a second `=` in a line would hide it"
    translators = pytest.importorskip('papermill.translators')
    read = {p.name: p.help for p in translators.PythonTranslator.inspect(parameters(name) | dict(source=source(parameters(name))))}
    from arpo_nb.docs import field_notes
    assert list(read) == [n.name for n in field_notes(source(parameters(name)))]


# Pages

@pytest.mark.parametrize('name', PAGES)
def test_first_screen(name):
    cells = PAGES[name]['cells']
    title = re.match(r'# (.+)\n\n> .+', source(cells[0]))
    assert title, 'a title and a line in quotes that says what this is'
    assert name == 'index.ipynb' or '_' not in title[1] and title[1][0].isupper(), 'a title for people, not the name of a module'
    assert cells[1]['cell_type'] == 'markdown' and len(source(cells[1])) > 60, 'a paragraph that says why one would read it'


@pytest.mark.parametrize('name', PAGES)
def test_figures_have_alternative_text(name):
    drawn = [c for c in PAGES[name]['cells'] if any('image/png' in o.get('data', {}) for o in c.get('outputs', []))]
    assert not [source(c)[:80] for c in drawn if not re.search(r'^#\|\s*fig-alt: .{15,}', source(c), re.M)]
    assert not re.search(r'!\[\]\(', prose(name))


@pytest.mark.parametrize('name', PAGES)
def test_outputs_say_nothing_of_the_machine(name):
    assert PAGES[name] == tidy(json.loads((NBS/name).read_text(encoding='utf-8'))), 'run python scripts/outputs.py'


def test_outputs_lose_places_and_keep_what_was_said():
    warned = '/var/folders/kernel_1/2.py:3: UserWarning: one picture skipped, /var/folders/x1/tmpab12cd34/a.png\n  warnings.warn(text)\n'
    library = '/x/lib/python3.11/site-packages/tqdm/auto.py:21: TqdmWarning: no bar\n  from .autonotebook import tqdm\n'
    bar = 'toy vapi:   2%|▏         | 1/60 [00:05<04:59,  5.07s/it]\n'
    assert without_places(library + bar + warned + '  indented\n') == 'UserWarning: one picture skipped, TMP/a.png\n  indented\n'


@pytest.mark.parametrize('name', PAGES)
def test_cell_options_are_yaml(name):
    "`#| fig-alt: a: b` stops the build; a text with a colon stands in quotes"
    yaml = pytest.importorskip('yaml')
    for cell in PAGES[name]['cells']:
        options = re.findall(r'^#\|\s*([\w-]+: .*)$', source(cell), re.M) if cell['cell_type'] == 'code' else []
        for option in options: assert isinstance(yaml.safe_load(option), dict), option


CITED = {'2512.19680': r'VA-π Eq\.', '2603.23086': r'LOO-FID Eq\.', '2505.23331': r'VAR-GRPO Eq\.'}


@pytest.mark.parametrize('name', PAGES)
def test_cited_equations_have_a_reference(name):
    text = '\n'.join(source(c) for c in PAGES[name]['cells'])
    needed = list(CITED) if name in ('index.ipynb', '00_notation.ipynb') else [k for k, p in CITED.items() if re.search(p, text)]
    assert not [f'arxiv.org/abs/{k}' for k in needed if f'arxiv.org/abs/{k}' not in text]


# nbdev's part of the work, and ours

def process(home):
    for name in ('nbs', 'arpo_nb'): shutil.copytree(ROOT/name, home/name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(ROOT/name, home/name)
    # in one process: each further one would import all modules again. There is little garbage, and to look for it takes longer than
    # the pages; in the end the shells of all pages would be cleared one by one
    code = 'import gc, os; gc.disable(); from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True); os._exit(0)'
    done = subprocess.run([sys.executable, '-c', code], cwd=home, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(home)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'Found cells containing imports and other code' not in done.stderr, done.stderr[-3000:]


@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    pytest.importorskip('nbdev')
    return once(tmp_path_factory, 'site', process)/'_proc'


def shown(folder, name):
    "All Markdown of a processed page, entries included"
    cells = json.loads((folder/name).read_text(encoding='utf-8'))['cells']
    outs = [''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]
    return '\n'.join([*(''.join(c['source']) for c in cells if c['cell_type'] != 'code'), *outs])


def test_notebooks_process_for_the_site(processed):
    assert {p.name for p in processed.glob('*.ipynb')} == set(PAGES)
    assert (processed/'images/brightness.png').is_file() and (processed/'fonts/STIX2Math.woff2').is_file()


def test_entries_have_fields_and_methods(processed):
    from arpo_nb.docs import field_notes
    text = shown(processed, '01_protocols.ipynb')
    assert '#### Policy.generate' in text and '#### Reward.__call__' in text and '\n### Streams.take' in text # grown by `@patch`
    assert '| `old_logps` | `Tensor` |' in text and 'subtitle: arpo_nb.protocols' in text
    assert '| `noise_rate` |' in shown(processed, '02_config.ipynb')
    for name in RUNS:
        names = [n.name for n in field_notes(source(parameters(name)))]
        assert not [n for n in names if f'| `{n}` |' not in shown(processed, name)]


@pytest.mark.parametrize('name', sorted(set(PAGES) - {'index.ipynb'}))
def test_first_screen_says_what_is_needed_and_what_comes_next(processed, name):
    head, = re.findall(r'^::: \{.page-head\}\n(.*?)\n:::$', shown(processed, name), re.M | re.S)
    assert head.startswith(('**Builds on**', '**You need**')) and '\n**Next** ' in head
    assert re.search(r'\*\*Next\*\* .*\]\(', head), 'the next page is a link'


@pytest.mark.parametrize('name', PAGES)
def test_no_page_ends_in_shown_source(name):
    "nbdev looks at the cell after it, and fails if there is none"
    kind = EXPORT.search(source(PAGES[name]['cells'][-1]))
    assert not kind or kind[1] != 'exports'


def test_names_lead_to_their_entries(processed):
    assert '[`Rollout`](protocols.html#rollout)' in shown(processed, '01_protocols.ipynb')
    text = '\n'.join(shown(processed, n) for n in PAGES)
    made = re.findall(r'\[`([\w.]+)(?:\(\))?`\]\((\w+\.html)#', text)
    assert len(made) > 50
    pages = {page_name(n) for n in PAGES}
    assert not [m for m in made if m[1] not in pages]


def test_site_renders(tmp_path):
    if not shutil.which('quarto'): pytest.skip('quarto is not installed')
    for name in ('nbs', 'arpo_nb'): shutil.copytree(ROOT/name, tmp_path/name, symlinks=True)
    for name in ('settings.ini', '_quarto.yml', 'setup.py', 'README.md'): shutil.copy(ROOT/name, tmp_path/name)
    subprocess.run(['nbdev_docs'], cwd=tmp_path, check=True)
    assert (tmp_path/'_docs'/'index.html').exists()
    assert Path(tmp_path/'_docs'/'images/brightness.png').exists()
