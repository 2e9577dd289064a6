"""Procedural flat-style landscapes and shapes with captions (training data for the demo model)."""
import math, random
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

S = 128
SS = 2  # supersampling

COLORS = {
    "red": (214, 48, 49), "orange": (240, 140, 40), "yellow": (250, 205, 60), "green": (60, 160, 80),
    "blue": (50, 100, 210), "purple": (130, 70, 180), "pink": (240, 130, 170), "white": (245, 245, 245),
    "black": (25, 25, 30), "gray": (130, 130, 135), "brown": (120, 75, 45), "teal": (40, 160, 160),
}
SHAPES = ["circle", "square", "triangle", "star", "heart", "diamond", "ring", "hexagon"]

def jit(c, r, a=10):
    return tuple(int(max(0, min(255, v + r.randint(-a, a)))) for v in c)

def mix(a, b, t):
    return tuple(int(x + (y - x) * t) for x, y in zip(a, b))

def gradient(size, top, bottom):
    t = np.linspace(0, 1, size)[:, None, None]
    img = (1 - t) * np.array(top)[None, None] + t * np.array(bottom)[None, None]
    return Image.fromarray(np.repeat(img, size, 1).astype(np.uint8))

TIMES = {
    "sunrise": ((250, 190, 160), (255, 235, 190), (90, 80, 120)),
    "day": ((90, 170, 240), (210, 235, 250), (70, 120, 90)),
    "sunset": ((80, 50, 120), (250, 130, 70), (60, 30, 70)),
    "night": ((10, 12, 45), (35, 45, 100), (15, 18, 40)),
}

def ridge(r, w, base, amp, rough):
    n = 5
    ph = [r.uniform(0, 2 * math.pi) for _ in range(n)]
    am = [amp / (k + 1) ** rough for k in range(n)]
    fr = [r.uniform(0.7, 1.3) * (k + 1) for k in range(n)]
    xs = np.linspace(0, 1, w)
    y = sum(a * np.sin(2 * math.pi * f * xs + p) for a, f, p in zip(am, fr, ph))
    return base + y

def peaks(r, w, base, amp):
    k = r.randint(3, 5)
    px = sorted(r.uniform(0, 1) for _ in range(k))
    pts = [(0, base + r.uniform(-.1, .3) * amp)]
    for x in px:
        pts.append((x, base - r.uniform(.5, 1.0) * amp))
        pts.append((min(1, x + r.uniform(.06, .14)), base - r.uniform(-.1, .3) * amp))
    pts.append((1, base + r.uniform(-.1, .3) * amp))
    pts.sort()
    xs = np.linspace(0, 1, w)
    return np.interp(xs, [p[0] for p in pts], [p[1] for p in pts])

def fill(d, ys, h, color):
    w = len(ys)
    d.polygon([(0, h)] + [(x, float(y)) for x, y in enumerate(ys)] + [(w - 1, h)], fill=color)

def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word

def landscape(r):
    N = S * SS
    time = r.choice(list(TIMES))
    top, bot, ground = TIMES[time]
    img = gradient(N, jit(top, r), jit(bot, r))
    d = ImageDraw.Draw(img)
    place = r.choice(["mountains", "hills", "sea", "desert", "forest", "city"])
    extras = []
    horizon = N * r.uniform(.52, .66)
    if time == "night":
        for _ in range(r.randint(14, 30)):
            x, y = r.uniform(0, N), r.uniform(0, horizon)
            s = r.choice([2, 2, 3])
            d.ellipse([x - s, y - s, x + s, y + s], fill=(235, 235, 250))
    orb = None
    if r.random() < .6:
        orb = "moon" if time == "night" else "sun"
        rad = N * r.uniform(.075, .115)
        side = r.choice(["left", "right", "middle"])
        cx = {"left": .22, "right": .78, "middle": .5}[side] * N + r.uniform(-.04, .04) * N
        cy = (r.uniform(.14, .26) if time in ("day", "night") else r.uniform(.40, .50)) * N
        col = {"sunrise": (255, 235, 170), "day": (255, 225, 80), "sunset": (255, 90, 60), "night": (245, 240, 215)}[time]
        if time != "night":
            d.ellipse([cx - rad * 1.5, cy - rad * 1.5, cx + rad * 1.5, cy + rad * 1.5], fill=mix(col, bot, .7))
        d.ellipse([cx - rad, cy - rad, cx + rad, cy + rad], fill=col)
        extras.append("a moon" if orb == "moon" else "a sun")
        if r.random() < .5:
            extras[-1] += {"left": " on the left", "right": " on the right", "middle": " in the middle"}[side]
    if r.random() < .25 and time in ("day", "sunrise"):
        for _ in range(r.randint(2, 4)):
            x, y, w = r.uniform(0, N), r.uniform(.08, .35) * N, r.uniform(.09, .15) * N
            for dx, dy, q in ((-.5, .1, .6), (0, 0, .8), (.5, .12, .55)):
                d.ellipse([x + dx * w - q * w, y + dy * w - q * w * .5, x + dx * w + q * w, y + dy * w + q * w * .5], fill=(250, 250, 252))
        extras.append("clouds")
    if place == "mountains":
        far = mix(ground, bot, .55); near = mix(ground, bot, .15)
        fill(d, peaks(r, N, horizon, N * .28), N, jit(far, r, 6))
        fill(d, peaks(r, N, horizon + N * .10, N * .2), N, jit(near, r, 6))
        fill(d, ridge(r, N, N * .86, N * .02, 1), N, jit(mix(ground, (40, 90, 50), .4), r, 6))
    elif place == "hills":
        for i, t in enumerate((.6, .35, .1)):
            c = mix(mix(ground, (80, 170, 80), .55 if time in ("day", "sunrise") else .2), bot, t)
            fill(d, ridge(r, N, horizon + i * N * .13, N * .045, 1.2), N, jit(c, r, 6))
    elif place == "sea":
        c0 = mix(mix(top, (20, 90, 160), .5), bot, .35 if time in ("day", "sunrise") else .15)
        c1 = mix(c0, {"night": (120, 140, 200), "sunset": (255, 170, 110)}.get(time, (255, 250, 235)), .35)
        d.rectangle([0, horizon, N, N], fill=jit(c0, r, 6))
        for i in range(7):
            y = horizon + (i + .7) ** 1.35 / 7 ** 1.35 * (N - horizon)
            x = r.uniform(-.1, .4) * N
            while x < N:
                w = r.uniform(.06, .2) * N
                d.line([(x, y), (x + w, y)], fill=c1, width=3 + i // 2)
                x += w + r.uniform(.1, .3) * N
        if r.random() < .5:
            bx, by, bw = r.uniform(.25, .75) * N, horizon + N * r.uniform(.12, .22), N * r.uniform(.12, .15)
            d.polygon([(bx - bw, by), (bx + bw, by), (bx + bw * .6, by + bw * .45), (bx - bw * .6, by + bw * .45)], fill=(110, 60, 35))
            d.polygon([(bx, by - bw * .1), (bx, by - bw * 1.7), (bx + bw * .9, by - bw * .1)], fill=(250, 250, 245))
            extras.append("a boat")
    elif place == "desert":
        for i, t in enumerate((.5, .2)):
            c = mix(mix((225, 170, 90), ground, .55 if time in ("night", "sunset") else .05), bot, t * .5)
            fill(d, ridge(r, N, horizon + N * .03 + i * N * .17, N * .04, 1.5), N, jit(c, r, 6))
        if r.random() < .5:
            for _ in range(r.randint(1, 3)):
                x, y, h = r.uniform(.1, .9) * N, N * r.uniform(.80, .93), N * r.uniform(.18, .28)
                g = mix((50, 130, 70), ground, .5 if time in ("night", "sunset") else .0)
                w = h * .09
                d.rounded_rectangle([x - w, y - h, x + w, y], w, fill=g)
                d.rounded_rectangle([x - h * .35, y - h * .75, x - h * .35 + 2 * w, y - h * .4], w, fill=g)
                d.rectangle([x - h * .35 + w, y - h * .5, x, y - h * .4], fill=g)
                d.rounded_rectangle([x + h * .3 - w, y - h * .85, x + h * .3 + w, y - h * .5], w, fill=g)
                d.rectangle([x, y - h * .6, x + h * .3, y - h * .5], fill=g)
            extras.append("cactus")
    elif place == "forest":
        fill(d, ridge(r, N, horizon, N * .03, 1.2), N, jit(mix(ground, bot, .45), r, 6))
        for row, (yb, t, k) in enumerate(((.74, .35, 7), (.92, .05, 5))):
            base = mix(mix((30, 110, 60), ground, .6 if time in ("night", "sunset") else .1), bot, t)
            for i in range(k):
                x = (i + r.uniform(.1, .9)) / k * N; y = N * yb + r.uniform(-.02, .02) * N; h = N * r.uniform(.28, .40)
                for q in range(3):
                    w = h * (.34 - .07 * q); yy = y - h * (.12 + .26 * q)
                    d.polygon([(x - w, yy), (x + w, yy), (x, yy - h * .42)], fill=base)
                d.rectangle([x - h * .04, y - h * .12, x + h * .04, y], fill=mix((90, 60, 40), ground, .4))
            fill(d, ridge(r, N, N * yb, N * .01, 1), N, mix(base, ground, .3))
    else:
        base = mix(ground, bot, .3)
        x = 0
        while x < N:
            w = N * r.uniform(.11, .20); h = N * r.uniform(.18, .45); y0 = N * .85 - h
            c = jit(mix(base, (60, 65, 85), .4), r, 8)
            d.rectangle([x, y0, x + w, N], fill=c)
            lit = (255, 225, 130) if time in ("night", "sunset") else mix(c, (220, 235, 250), .6)
            step = N * .055
            yy = y0 + step * .8
            while yy < N * .82:
                xx = x + step * .6
                while xx < x + w - step * .6:
                    if r.random() < .6:
                        d.rectangle([xx, yy, xx + step * .45, yy + step * .5], fill=lit)
                    xx += step
                yy += step * 1.2
            x += w + N * r.uniform(0, .03)
        d.rectangle([0, N * .9, N, N], fill=mix(ground, (40, 40, 48), .5))
    if place in ("hills", "mountains") and r.random() < .55:
        kind = r.choice(["house", "house", "tree"])
        k = r.choice([1, 1, 2, 3]); h = N * r.uniform(.17, .23) * (1 if k == 1 else .85)
        spots = [r.uniform(.2, .8) * N] if k == 1 else [(i + .5 + r.uniform(-.12, .12)) / k * N for i in range(k)]
        names = [r.choice(["red", "white", "yellow", "blue"]) for _ in range(k)]
        if r.random() < .5: names = names[:1] * k
        for x, cn in zip(spots, names):
            y = N * r.uniform(.86, .95)
            if kind == "house":
                c = COLORS[cn] if time != "night" else mix(COLORS[cn], ground, .45)
                d.rectangle([x - h * .6, y - h * .7, x + h * .6, y], fill=c)
                d.polygon([(x - h * .75, y - h * .7), (x + h * .75, y - h * .7), (x, y - h * 1.25)], fill=mix((120, 60, 45), ground, .3))
                d.rectangle([x - h * .12, y - h * .38, x + h * .14, y], fill=(80, 50, 40))
                d.rectangle([x + h * .25, y - h * .5, x + h * .47, y - h * .27], fill=(255, 230, 140))
            else:
                d.rectangle([x - h * .08, y - h * .6, x + h * .08, y], fill=mix((95, 65, 40), ground, .2))
                g = mix((50, 140, 60), ground, .45 if time in ("night", "sunset") else .05)
                for dx, dy, q in ((0, -1.0, .42), (-.28, -.75, .34), (.28, -.75, .34)):
                    d.ellipse([x + dx * h - q * h, y + dy * h - q * h, x + dx * h + q * h, y + dy * h + q * h], fill=g)
        if kind == "tree": extras.append("a tree" if k == 1 else "trees")
        elif k == 1: extras.append(article(names[0]) + " house" if r.random() < .75 else "a house")
        else: extras.append(names[0] + " houses" if len(set(names)) == 1 and r.random() < .75 else "houses")
    if r.random() < .2 and time != "night":
        for _ in range(r.randint(2, 5)):
            x, y, q = r.uniform(.1, .9) * N, r.uniform(.1, .4) * N, N * r.uniform(.025, .045)
            d.arc([x - 2 * q, y - q, x, y + q], 200, 340, fill=(40, 40, 50), width=4)
            d.arc([x, y - q, x + 2 * q, y + q], 200, 340, fill=(40, 40, 50), width=4)
        extras.append("birds")
    img = img.resize((S, S), Image.LANCZOS)
    noun = {"mountains": "mountains", "hills": "green hills" if time in ("day", "sunrise") else "hills", "sea": "the sea", "desert": "a desert", "forest": "a forest", "city": "a city"}[place]
    form = r.choice(["{t} over {n}", "a {t} over {n}", "{n} at {t}", "{n} at {t}", "a painting of {n} at {t}", "a picture of {n} at {t}", "{t}, {n}", "{n}, {t}"])
    cap = form.format(t=time, n=noun)
    if extras:
        r.shuffle(extras)
        cap += r.choice([" with ", ", "]) + (", ".join(extras) if r.random() < .3 else " and ".join(extras))
    return img, cap

def shape_points(kind, cx, cy, q, rot):
    def poly(n, r0, ph):
        return [(cx + r0 * math.cos(ph + 2 * math.pi * i / n), cy + r0 * math.sin(ph + 2 * math.pi * i / n)) for i in range(n)]
    if kind == "square": return poly(4, q * 1.2, math.pi / 4 + rot)
    if kind == "triangle": return poly(3, q * 1.2, -math.pi / 2 + rot)
    if kind == "diamond": return [(cx, cy - q * 1.25), (cx + q * .8, cy), (cx, cy + q * 1.25), (cx - q * .8, cy)]
    if kind == "hexagon": return poly(6, q * 1.1, rot)
    if kind == "star":
        return [(cx + (q * 1.25 if i % 2 == 0 else q * .52) * math.cos(-math.pi / 2 + rot + math.pi * i / 5),
                 cy + (q * 1.25 if i % 2 == 0 else q * .52) * math.sin(-math.pi / 2 + rot + math.pi * i / 5)) for i in range(10)]
    if kind == "heart":
        pts = []
        for i in range(60):
            t = 2 * math.pi * i / 60
            x = 16 * math.sin(t) ** 3
            y = -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
            pts.append((cx + x * q / 15, cy + y * q / 15))
        return pts

def draw_shape(d, kind, cx, cy, q, col, bg, r):
    rot = r.uniform(-.2, .2)
    if kind == "circle": d.ellipse([cx - q, cy - q, cx + q, cy + q], fill=col)
    elif kind == "ring":
        d.ellipse([cx - q * 1.1, cy - q * 1.1, cx + q * 1.1, cy + q * 1.1], fill=col)
        d.ellipse([cx - q * .6, cy - q * .6, cx + q * .6, cy + q * .6], fill=bg)
    else: d.polygon(shape_points(kind, cx, cy, q, rot), fill=col)

def shapes(r):
    N = S * SS
    bgn = r.choice(list(COLORS)); bg = jit(COLORS[bgn], r, 6)
    img = Image.new("RGB", (N, N), bg); d = ImageDraw.Draw(img)
    rest = [c for c in COLORS if c != bgn]
    c1 = r.choice(rest); s1 = r.choice(SHAPES)
    if r.random() < .75:
        size = r.choice(["", "", "small ", "large "])
        q = N * {"": r.uniform(.22, .28), "small ": r.uniform(.11, .15), "large ": r.uniform(.33, .38)}[size]
        j = .05 if size != "large " else .02
        draw_shape(d, s1, N * (.5 + r.uniform(-j, j)), N * (.5 + r.uniform(-j, j)), q, jit(COLORS[c1], r, 6), bg, r)
        cap = f"{article((size + c1 + ' ' + s1))} on {article(bgn)} background"
    else:
        c2 = r.choice([c for c in rest if c != c1]); s2 = r.choice(SHAPES)
        rel = r.choice(["left of", "right of", "above", "below", "and"])
        q = N * r.uniform(.15, .19)
        a, b = (.27, .5), (.73, .5)
        if rel == "right of": a, b = b, a
        if rel == "above": a, b = (.5, .27), (.5, .73)
        if rel == "below": a, b = (.5, .73), (.5, .27)
        for (px, py), c, s in ((a, c1, s1), (b, c2, s2)):
            draw_shape(d, s, N * (px + r.uniform(-.03, .03)), N * (py + r.uniform(-.03, .03)), q, jit(COLORS[c], r, 6), bg, r)
        cap = f"{article(c1 + ' ' + s1)} {rel} {article(c2 + ' ' + s2)} on {article(bgn)} background"
    return img.resize((S, S), Image.LANCZOS), cap

def sample(r):
    img, cap = landscape(r) if r.random() < .72 else shapes(r)
    return np.asarray(img), cap

if __name__ == "__main__":
    r = random.Random(1)
    sheet = Image.new("RGB", (8 * S, 6 * S))
    for i in range(48):
        a, c = sample(r)
        sheet.paste(Image.fromarray(a), ((i % 8) * S, (i // 8) * S))
        if i < 16: print(c)
    sheet.save("sheet.png")
    import time; t = time.time()
    for i in range(200): sample(r)
    print("per sample ms", (time.time() - t) / 200 * 1000)
